"""The official Python clients of OpenAI and Anthropic in a soak. They repeat no request by themselves."""

import time
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai

from moe_lab.soak.answers import ReadAnswer, SoakRoute
from moe_lab.soak.client import PATIENCE_S, Reachable, shows_mock
from moe_lab.soak.deliveries import Received
from moe_lab.soak.traffic import SoakRequest

# After the end of a gateway the pool of a client may have connections that lead there for so long.
POOL_S = 10.0
_EXTRA = ("ignore_eos",)


class OfficialClients:
    """Both clients for one gateway; their connections are kept and used again."""

    def __init__(self, gateway: Reachable) -> None:
        self.gateway = gateway
        url = f"http://127.0.0.1:{gateway.port}"
        options: dict[str, Any] = {"api_key": "any", "max_retries": 0, "timeout": PATIENCE_S}
        self._openai = openai.AsyncOpenAI(base_url=f"{url}/v1", **options)
        self._anthropic = anthropic.AsyncAnthropic(base_url=url, **options)

    async def close(self) -> None:
        """Ends the connections of both."""
        await self._openai.close()
        await self._anthropic.close()

    async def ask(self, request: SoakRequest) -> Received | None:
        """Sends a request and reads its answer; None where no gateway listens, so that nothing was sent.

        A connection of the client's pool may be one of a gateway that has just ended.
        """
        texts, error, status, is_complete = [], "", 200, True
        kills, is_changing = self.gateway.kills, time.monotonic() - self.gateway.changed_s < POOL_S
        try:
            async for text in self._texts(request):
                texts.append(text)
        except (openai.APIStatusError, anthropic.APIStatusError) as refusal:
            status, error = refusal.status_code, str(refusal)
        except (openai.APIConnectionError, anthropic.APIConnectionError) as failure:
            if _is_refused(failure):
                return None
            status, error, is_complete = 200 if texts else 0, repr(failure.__cause__ or failure), False
        except (openai.APIError, anthropic.APIError) as failure:
            error = str(failure)
        except Exception as failure:
            # The transport below the clients, within a stream, or where a connection ends as soon as it is open.
            status, error, is_complete = 200 if texts else 0, repr(failure), False
        # An error within a stream has the status of the error in one client, and none in the other.
        status = 200 if texts else status
        answer = ReadAnswer(text="".join(texts), ends=0 if error else 1, error=error, has_begun=bool(texts))
        return Received(
            status=status,
            answer=answer,
            is_complete=is_complete,
            is_mock=shows_mock(request, answer),
            timed_out="Timeout" in error,
            is_gateway_killed=self.gateway.kills != kills or (is_changing and not is_complete),
            detail=f"official client, status {status}, {request.api.value}, stream {request.stream}: {error}",
        )

    async def _texts(self, request: SoakRequest) -> AsyncIterator[str]:
        """The texts of an answer as they come; of one in one piece all at once."""
        made = {name: value for name, value in request.body.items() if name not in _EXTRA}
        extra = {name: request.body[name] for name in _EXTRA if name in request.body}
        if request.api is SoakRoute.MESSAGES:
            # The client of Anthropic takes no temperature of 0 for every model; the engine is deterministic without.
            del made["temperature"]
        answer = await self._create(request.api, made | {"extra_body": extra} if extra else made)
        if not request.stream:
            yield _text_of(request.api, answer)
            return
        async for event in answer:
            for text in _tokens_of(request.api, event):
                yield text

    async def _create(self, api: SoakRoute, made: dict[str, Any]) -> Any:
        match api:
            case SoakRoute.COMPLETIONS:
                return await self._openai.completions.create(**made)
            case SoakRoute.CHAT:
                return await self._openai.chat.completions.create(**made)
            case SoakRoute.MESSAGES:
                return await self._anthropic.messages.create(**made)
            case SoakRoute.RESPONSES:
                return await self._openai.responses.create(**made)


def _is_refused(failure: BaseException) -> bool:
    """Whether no connection was made. The class is that of the HTTP library below, which differs by client."""
    return type(failure.__cause__).__name__ == "ConnectError"


def _text_of(api: SoakRoute, answer: Any) -> str:
    match api:
        case SoakRoute.COMPLETIONS:
            return str(answer.choices[0].text)
        case SoakRoute.CHAT:
            return str(answer.choices[0].message.content)
        case SoakRoute.MESSAGES:
            return "".join(block.text for block in answer.content)
        case SoakRoute.RESPONSES:
            return str(answer.output_text)


def _tokens_of(api: SoakRoute, event: Any) -> list[str]:
    match api:
        case SoakRoute.COMPLETIONS:
            return [choice.text or "" for choice in event.choices]
        case SoakRoute.CHAT:
            deltas = (choice.delta for choice in event.choices)
            return [delta.content for delta in deltas if delta.content is not None and delta.role is None]
        case SoakRoute.MESSAGES:
            return [event.delta.text] if event.type == "content_block_delta" else []
        case SoakRoute.RESPONSES:
            return [event.delta] if event.type == "response.output_text.delta" else []
