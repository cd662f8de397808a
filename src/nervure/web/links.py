"""Addresses of the pages, on a server or in a folder of files."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Links:
    """Build addresses.

    Args:
        root: What leads from a page to the first page's folder: ``"/"`` on a server, ``""`` or ``"../"`` in files.
        ending: What a page's name ends with: nothing on a server, ``".html"`` in files.

    Examples:
        >>> Links().page("paper", "snip"), Links(root="../", ending=".html").page("paper", "snip")
        ('/paper/snip', '../paper/snip.html')
        >>> Links().page(), Links(root="", ending=".html").page()
        ('/', 'index.html')
    """

    root: str = "/"
    ending: str = ""

    @property
    def live(self) -> bool:
        """Return whether there is a server that answers."""
        return not self.ending

    def page(self, *parts: str) -> str:
        """Return the address of a page.

        Args:
            *parts: Its path; none for the first page.

        Returns:
            The address.
        """
        if not parts:
            return self.root if self.live else f"{self.root}index{self.ending}"
        return f"{self.root}{'/'.join(quote(part, safe='') for part in parts)}{self.ending}"

    def static(self, name: str) -> str:
        """Return the address of a style sheet or script.

        Args:
            name: The file.

        Returns:
            The address.
        """
        return f"{self.root}static/{quote(name, safe='')}"
