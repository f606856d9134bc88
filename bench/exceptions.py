"""What can go wrong around the runtime.

HeadraceError
└── LinkError       an emulated link cannot be made on this machine, or has broken
"""

from __future__ import annotations

from ..models.exceptions import HeadraceError


class LinkError(HeadraceError):
    """An emulated link cannot be made on this machine, or has broken."""
