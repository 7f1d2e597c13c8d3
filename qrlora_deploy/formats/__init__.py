"""The project's file formats, and what other formats say of a customer."""
