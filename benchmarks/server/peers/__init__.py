"""The session of `serve` behind other servers, and PEFT's mixed batch behind one of them."""
