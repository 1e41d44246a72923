"""Views of a program as text, JSON, DOT, SVG and HTML."""
