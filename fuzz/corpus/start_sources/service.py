"""A service."""
from __future__ import annotations
import os, sys as system
from typing import TYPE_CHECKING
from .. import sibling
from ...package.module import (
    first,  # one
    second as other,
)
try: import optional
except ImportError:
    optional = None
if TYPE_CHECKING:
    from .types import Everything
class Server:
    import socket; import ssl
    async def run(self):
        import asyncio
text = '''
import nothing
''' + "\"import nothing\"" \
    + 'x'
if __name__ == "__main__":
    from main import run
