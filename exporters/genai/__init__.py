"""Decoders for other runtimes: onnxruntime-genai and transformers.js open what is written here."""
