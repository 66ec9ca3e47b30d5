"""From Vault's responses to the files of an object (docs/contract.md section 2, docs/decisions/shapes.md)."""

from provider.render.job import Files, RenderedFile
from provider.render.renderer import Answered, Renderer
from provider.render.values import render_plain

__all__ = ["Answered", "Files", "RenderedFile", "Renderer", "render_plain"]
