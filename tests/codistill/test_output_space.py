"""The digest of an output space."""

from codistill import fingerprint


def test_names_and_their_order_make_the_fingerprint() -> None:
    of = [fingerprint(["cat", "dog"]), fingerprint(["dog", "cat"]), fingerprint(["cat, dog"]), fingerprint(2)]
    assert len(set(of)) == 4
    assert fingerprint(("cat", "dog")) == of[0]


def test_it_is_what_a_manifest_takes() -> None:
    assert len(fingerprint(10)) == 64
    assert int(fingerprint(10), 16) > 0
