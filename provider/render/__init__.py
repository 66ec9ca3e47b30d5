"""From Vault's responses to the files of an object (docs/contract.md section 2, docs/decisions/shapes.md)."""

from provider.render.contents import Contents, Files, RenderedFile, too_large
from provider.render.renderer import Answered, Renderer
from provider.render.values import render_plain

__all__ = ["Answered", "Contents", "Files", "RenderedFile", "Renderer", "render_plain", "too_large"]
