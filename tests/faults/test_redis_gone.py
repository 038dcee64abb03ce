"""The Redis server between the pools goes away and comes back."""

from pathlib import Path

import pytest

from kv_transfer.embedded import EmbeddedServer
from kvrelay.errors import NoWorker, TransportLost
from tests.served import serve

PROMPT = "The old lighthouse keeper said that"


def test_requests_fail_clearly_without_redis_and_work_again_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    redis = EmbeddedServer(folder=folder)
    try:
        with serve("--model", "smollm2", "--transport", redis.uri) as served:
            expected = served.ask(PROMPT, temperature=0, max_tokens=8).token_ids
            redis.stop()
            with pytest.raises((TransportLost, NoWorker)):
                served.ask(PROMPT + " now", temperature=0, max_tokens=8)
            served.assert_nothing_leaked(1, 1)
            redis = EmbeddedServer(folder=folder)
            assert served.ask(PROMPT, temperature=0, max_tokens=8).token_ids == expected
            served.assert_nothing_leaked(1, 1)
    finally:
        redis.stop()
