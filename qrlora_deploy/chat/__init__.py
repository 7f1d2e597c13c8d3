"""Chats as text: the templates that bases bring along, rendered within bounds; needs jinja2, the extra [llm], alone."""
