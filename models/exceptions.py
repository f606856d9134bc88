"""What can go wrong in the parts that both sides share.

HeadraceError
├── BundleError               a bundle cannot be read, is incomplete, or does not verify
│   ├── FingerprintError      two sides hold different bundles
│   └── BackboneError         the backbone's weights are missing or are not the ones the bundle was made from
├── BitstreamError            bytes are not a packet, or not one of this bundle
│   └── LimitError            a declared size is over the limit; nothing was allocated for it
├── OperatingPointError       no such operating point, or one that cannot be used here
└── DataError                 an input file or folder cannot be used
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose. Its text names the thing and the remedy."""


class BundleError(HeadraceError):
    """A bundle cannot be read, is incomplete, or does not verify."""


class FingerprintError(BundleError):
    """Two sides hold different bundles."""


class BackboneError(BundleError):
    """The backbone's weights are missing or are not the ones that the bundle was made from."""


class BitstreamError(HeadraceError):
    """Bytes are not a packet, or not a packet of this bundle."""


class LimitError(BitstreamError):
    """A declared size is over the limit. Raised before anything of that size is allocated."""


class OperatingPointError(HeadraceError):
    """No such operating point, or one that cannot be used here."""


class DataError(HeadraceError):
    """An input file or folder cannot be used."""
