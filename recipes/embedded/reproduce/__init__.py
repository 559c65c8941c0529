"""Every figure of the paper at embedded scale: digits for its images, Home Assistant's strings for its translations."""
