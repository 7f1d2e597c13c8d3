"""The description of the interface, OpenAPI 3.1, by hand: the server has few routes and no models of a framework."""

from typing import Any

from qrlora_deploy.serving.http import openapi_text
from qrlora_deploy.serving.outputs import DATATYPES
from qrlora_deploy.version import __version__

TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}

ERRORS = {
    "400": "the request is malformed",
    "401": "there is no key, or none that is known",
    "404": "there is no such model or customer, or the key may not use it",
    "413": "the body or the number of rows is over its bound",
    "422": "a customer's file cannot be used",
    "429": "too much is asked at a time; Retry-After says when to come again",
    "503": "the server starts or ends",
    "504": "the request's time has passed",
}

SCHEMAS: dict[str, Any] = {
    "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
    "ClassifyRequest": {
        "type": "object",
        "required": ["texts"],
        "additionalProperties": False,
        "properties": {
            "texts": TEXTS,
            "pairs": TEXTS | {"description": "the second texts, one per text, for a task on pairs"},
            "customer": {"type": "string", "description": "whose all texts are; without it the base answers"},
            "customers": {"type": "array", "items": {"type": ["string", "null"]}, "description": "one for each text"},
            "model": {"type": "string", "description": "without it the first one answers"},
        },
        "example": {"texts": ["where is my parcel?"], "customer": "acme"},
    },
    "Answer": {
        "type": "object",
        "required": ["label", "score", "labels", "customer", "customer_digest"],
        "properties": {
            "label": {"type": "string", "description": "the most likely one"},
            "score": {"type": "number", "description": "its probability; of a regression the value"},
            "labels": {"type": "array", "items": {"type": "string"}, "description": "all that apply"},
            "spans": {
                "type": "array",
                "items": {"$ref": "#/components/schemas/Span"},
                "description": "what was found in the text, of a model that tags words",
            },
            "customer": {"type": ["string", "null"]},
            "customer_digest": {"type": "string", "description": "of the content that answered; empty for the base"},
        },
    },
    "Span": {
        "type": "object",
        "required": ["text", "label", "start", "end", "score"],
        "properties": {
            "text": {"type": "string"},
            "label": {"type": "string"},
            "start": {"type": "integer", "description": "of its first character in the text"},
            "end": {"type": "integer"},
            "score": {"type": "number"},
        },
    },
    "ClassifyAnswer": {
        "type": "object",
        "required": ["model", "base_digest", "answers"],
        "properties": {
            "model": {"type": "string"},
            "base_digest": {"type": "string"},
            "answers": {"type": "array", "items": {"$ref": "#/components/schemas/Answer"}},
        },
    },
    "EmbeddingsRequest": {
        "type": "object",
        "required": ["input"],
        "properties": {
            "input": {"type": ["string", "array"], "items": {"type": "string"}},
            "customer": {"type": "string", "description": "whose all texts are; without it the base answers"},
            "customers": {"type": "array", "items": {"type": ["string", "null"]}, "description": "one for each text"},
            "model": {"type": "string", "description": "without it the first one answers"},
            "encoding_format": {"enum": ["float", "base64"]},
        },
        "example": {"input": ["where is my parcel?"], "customer": "acme"},
    },
    "Embedding": {
        "type": "object",
        "required": ["object", "index", "embedding", "customer_digest"],
        "properties": {
            "object": {"enum": ["embedding"]},
            "index": {"type": "integer"},
            "embedding": {"type": ["array", "string"], "items": {"type": "number"}},
            "customer_digest": {"type": "string", "description": "of the content that answered; empty for the base"},
        },
    },
    "EmbeddingsAnswer": {
        "type": "object",
        "required": ["object", "model", "base_digest", "data"],
        "properties": {
            "object": {"enum": ["list"]},
            "model": {"type": "string"},
            "base_digest": {"type": "string"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Embedding"}},
        },
    },
    "Tensor": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"type": "string"},
            "datatype": {"enum": ["BYTES", "INT64", "FP32", "FP16"]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "parameters": {"type": "object"},
            "data": {"type": "array"},
        },
    },
    "InferRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object", "properties": {"customer": {"type": "string"}}},
            "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"enum": list(DATATYPES)}, "parameters": {"type": "object"}},
                },
            },
        },
    },
    "InferAnswer": {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
        },
    },
}


def openapi() -> dict[str, Any]:
    """The document."""
    health = {"200": {"description": "yes"}, "503": {"description": "no"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qrlora-deploy", "version": __version__},
        "components": {
            "schemas": SCHEMAS | openapi_text.SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/classify": {"post": _post("Answer texts", "ClassifyRequest", "ClassifyAnswer")},
            "/v1/embeddings": {"post": _post("Vectors of texts", "EmbeddingsRequest", "EmbeddingsAnswer")},
            "/v1/completions": {"post": _post("Go on with texts", "CompletionRequest", "TextAnswer")},
            "/v1/chat/completions": {"post": _post("Answer a chat", "ChatRequest", "TextAnswer")},
            "/v1/models": {"get": _get("All models, as OpenAI's clients read them")},
            "/v1/models/{model}": {"get": _get("A model, or NAME:CUSTOMER"), "parameters": [_in_path("model")]},
            "/v2/models/{model}/infer": {
                "post": _post("Open Inference Protocol v2", "InferRequest", "InferAnswer"),
                "parameters": [_in_path("model")],
            },
            "/v2": {"get": _get("The server")},
            "/v2/models/{model}": {"get": _get("A model"), "parameters": [_in_path("model")]},
            "/v2/models/{model}/ready": {"get": _get("Is a model ready"), "parameters": [_in_path("model")]},
            "/v2/models/{model}/config": {"get": _get("As Triton has it"), "parameters": [_in_path("model")]},
            "/v2/models/{model}/stats": {"get": _get("As Triton has them"), "parameters": [_in_path("model")]},
            "/v2/models/stats": {"get": _get("Of all models")},
            "/v2/repository/index": {"post": _get("All models")},
            "/live.json": {"get": _get("What the page / shows of the last minutes")},
            "/v2/health/live": {"get": {"summary": "Does the process run", "security": [], "responses": health}},
            "/v2/health/ready": {"get": {"summary": "Are requests taken", "security": [], "responses": health}},
        },
    }


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _get(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "a JSON object or list"}, **_errors()}}


def _post(summary: str, request: str, answer: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "parameters": [
            {"name": "x-request-timeout-ms", "in": "header", "schema": {"type": "integer"}},
            {"name": "x-request-id", "in": "header", "schema": {"type": "string"}},
        ],
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {"200": {"description": "the answers", "content": _json(answer)}, **_errors()},
    }


def _errors() -> dict[str, Any]:
    return {code: {"description": text, "content": _json("Error")} for code, text in ERRORS.items()}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
