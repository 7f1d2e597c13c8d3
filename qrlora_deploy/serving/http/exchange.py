"""What the parts of the HTTP front leave for each other in the state of a request."""

from collections.abc import Callable, Mapping, Sequence

Headers = Mapping[bytes, bytes]

WriteWhole = Callable[[int, Sequence[tuple[bytes, bytes]], bytes], bool]
"""Write a reply with all of its body: status, headers, body. False: it cannot now, and was not written."""

HEADERS = "headers"
"""The request's headers by name, of several of one name the first one."""

REQUEST_ID = "request_id"
"""The client's own id, or the one that was made up."""

BODY_IS_HERE = "body_is_here"
"""Whether all of the body had come before the application began: nobody has to wait for it."""

WRITE_WHOLE = "write_whole"
"""A `WriteWhole`, where the server has one: a reply is one system call then, and wakes its client once."""
