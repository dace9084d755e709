"""`sparseforge serve`: transformers' OpenAI-compatible server around a packed model, on this machine alone by default.

The library's own handlers parse, validate, stream and answer; ours is the model behind them, and four of its routes:
chat and text completions, the list of models, health. Whatever would load, unload or fetch another model is left out.
"""

from __future__ import annotations

import argparse
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from sparseforge_core.errors import ExportError, SparseForgeError
from sparseforge_core.runtime.speech import Voice

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
"""Of the library's server, those that are about the one model that is served."""

log = logging.getLogger(__name__)


class OneModel:
    """Stands where the library keeps its models: there is one, it is loaded, and it stays."""

    def __init__(self, voice: Voice, name: str) -> None:
        self.voice, self.force_model = voice, name
        self.created = int(voice.folder.stat().st_mtime)

    def process_model_name(self, name: str) -> str:
        """The library would add a revision."""
        return name

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model that there is."""
        return self.voice.model, self.voice.tokenizer

    def get_model_modality(self, *_: Any, **__: Any) -> Any:
        """Text."""
        from transformers.cli.serving.utils import Modality

        return Modality.LLM

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The list of models."""
        return [{"id": self.force_model, "object": "model", "created": self.created, "owned_by": "sparseforge"}]

    def shutdown(self) -> None:
        """Nothing to let go of before the process ends."""


class _Asked:
    """What clients expect of `temperature`: above 0 it samples, from every token, as OpenAI's API says."""

    def _build_generation_config(self, body: dict[str, Any], given: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, given, use_cb=use_cb)  # type: ignore[misc]
        if body.get("temperature"):
            config.do_sample, config.top_k = True, 0
        return config


class Chat(_Asked, ChatCompletionHandler):  # type: ignore[misc]
    """Chat completions."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        if getattr(self.model_manager.voice.tokenizer, "chat_template", None) is None:
            raise HTTPException(400, "this model's tokenizer has no chat template; use /v1/completions")
        if not body.get("messages"):
            raise HTTPException(400, "messages: at least one is needed")
        return await super().handle_request(body, request_id)


class Text(_Asked, CompletionHandler):  # type: ignore[misc]
    """Text completions."""


def application(voice: Voice, name: str) -> FastAPI:
    """The server's application around a loaded model."""
    models, state = OneModel(voice, name), GenerationState()
    around: dict[str, Any] = {"model_manager": models, "generation_state": state}
    unused: Any = None  # their routes are removed below
    app = build_server(
        models,  # type: ignore[arg-type]
        Chat(**around),
        completion_handler=Text(**around),
        response_handler=unused,
        transcription_handler=unused,
        systemone_handler=unused,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in ROUTES]

    app.add_exception_handler(SparseForgeError, _said)
    app.add_exception_handler(HTTPException, _said)
    return app


async def _said(_request: Request, error: Exception) -> JSONResponse:
    """An error in the form in which clients of OpenAI's API look for its sentence."""
    message, code = (error.detail, error.status_code) if isinstance(error, HTTPException) else (str(error), 400)
    return JSONResponse({"error": {"message": message, "type": type(error).__name__}}, status_code=code)


def serve(options: argparse.Namespace, announce: Callable[[dict[str, str]], None] = lambda _: None) -> None:
    """Load a packed export and answer requests until the process is stopped; `announce` gets address and model.

    Raises ExportError, before anything is loaded, if the address cannot be bound.
    """
    listener = bound(options.host, options.port)
    try:
        given = {"device": options.device, "dense": options.dense, "cache": options.cache, "mode": options.mode}
        voice = Voice.load(options.folder, **given, warm=True)
        name = options.name or Path(options.folder).resolve().name
        host, port = listener.getsockname()[:2]
        announce({"address": f"http://{host}:{port}/v1", "model": name})
        if not options.quiet:
            log.warning("%s, %s", name, voice)
            log.warning("serving on http://%s:%d/v1 (stop with Ctrl-C)", host, port)
        logging.getLogger("transformers").setLevel(logging.ERROR)  # it would write a line for each request
        config = uvicorn.Config(application(voice, name), log_level="warning", server_header=False)
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()


def bound(host: str, port: int) -> socket.socket:
    """A socket on this address. Raises ExportError saying why there is none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ExportError(f"cannot listen on {host}:{port}: {error}; choose others with --host and --port") from error
    return found
