"""Relevance to look at: heat maps of images, strips of tokens, a page of an explanation."""

from graphopt.inspect.relevance.colours import colours, scale_of
from graphopt.inspect.relevance.images import grid, heatmap, image_figure, png
from graphopt.inspect.relevance.page import explanation_html
from graphopt.inspect.relevance.tokens import token_figure, token_html, token_text
from graphopt.inspect.relevance.view import ExplanationView, describe

__all__ = [
    "ExplanationView",
    "colours",
    "describe",
    "explanation_html",
    "grid",
    "heatmap",
    "image_figure",
    "png",
    "scale_of",
    "token_figure",
    "token_html",
    "token_text",
]
