"""What every test starts with: SIGINT as a terminal gives it, though a shell ignores it for what it starts with `&`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
