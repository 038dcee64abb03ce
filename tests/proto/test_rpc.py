"""What a thread tells calls reaches them in order, whoever wakes the loop."""

import asyncio
import threading

from kvrelay.errors import Internal
from kvrelay.rpc import EventStream, Outbox


def test_events_of_many_streams_arrive_in_order() -> None:
    async def serve() -> list[list[int]]:
        outbox: Outbox[int] = Outbox()
        streams = [EventStream(outbox) for _ in range(5)]

        def tell() -> None:
            for number in range(200):
                for stream in streams:
                    stream.emit(number)
            for stream in streams:
                stream.emit(None)

        async def read(stream: EventStream[int]) -> list[int]:
            return [event async for event in stream]

        thread = threading.Thread(target=tell)
        thread.start()
        found = await asyncio.gather(*map(read, streams))
        thread.join()
        return found

    assert asyncio.run(serve()) == [list(range(200))] * 5


def test_an_error_ends_a_stream_behind_its_events() -> None:
    async def serve() -> tuple[list[int], str]:
        stream: EventStream[int] = EventStream(Outbox())
        found: list[int] = []
        stream.emit(1)
        stream.emit(Internal("broken"))
        try:
            async for event in stream:
                found.append(event)
        except Internal as error:
            return found, str(error)
        return found, ""

    assert asyncio.run(serve()) == ([1], "broken")


def test_a_loop_that_has_ended_is_told_nothing() -> None:
    async def serve() -> EventStream[int]:
        return EventStream(Outbox())

    asyncio.run(serve()).emit(1)
