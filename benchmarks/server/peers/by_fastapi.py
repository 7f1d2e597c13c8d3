"""FastAPI and uvicorn over the session, as one would write it: pydantic's models, an endpoint in the thread pool.

python -m benchmarks.server.peers.by_fastapi PORT PROCESSES
"""

import sys

import fastapi
import uvicorn
from pydantic import BaseModel

from benchmarks.server.peers.answering import Behind


class Request(BaseModel):
    """What is asked."""

    texts: list[str]
    customers: list[str]


class Answer(BaseModel):
    """Of one text."""

    label: str
    score: float


class Response(BaseModel):
    """Of a request."""

    answers: list[Answer]


def application() -> fastapi.FastAPI:
    """The application, with a session of its own."""
    app, model = fastapi.FastAPI(), Behind.told().open()

    @app.post("/v1/classify")
    def classify(request: Request) -> Response:
        labels, scores = model.answer(request.texts, request.customers)
        pairs = zip(labels, scores, strict=True)
        return Response(answers=[Answer(label=label, score=score) for label, score in pairs])

    return app


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.server.peers.by_fastapi:application",
        factory=True,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        workers=int(sys.argv[2]),
        log_level="warning",
    )
