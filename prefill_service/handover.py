"""Which blocks leave the prefill arena when: each one once, as soon as its layer has all of its rows."""

from kv_transfer.block import BlockCodec
from kvrelay.errors import KvrelayError
from kvrelay_kernels.interface import Arena
from kvrelay_kernels.quant import BLOCK_TOKENS
from prefill_service.job import PrefillJob


class BlockFeed:
    """Gives the blocks of jobs to their senders. A sender's failure is kept in `job.error`."""

    def __init__(self, arena: Arena, codec: BlockCodec) -> None:
        self._arena = arena
        self._codec = codec

    def send_found(self, job: PrefillJob) -> None:
        """Send the blocks, all layers of them, that were found and not computed."""
        for layer in range(self._arena.layers):
            self._send(job, layer, 0, job.computed)

    def send_layer(self, job: PrefillJob, layer: int, tokens: int) -> None:
        """Send what is finished in one layer, now that the next `tokens` tokens are in it."""
        self._send(job, layer, job.computed // BLOCK_TOKENS * BLOCK_TOKENS, job.computed + tokens)

    def _send(self, job: PrefillJob, layer: int, start: int, end: int) -> None:
        """Send blocks from `start` on, the partly filled last one only where the prompt ends in it."""
        if job.sender is None or job.error is not None:
            return
        if end < len(job.token_ids):
            end -= end % BLOCK_TOKENS
        try:
            for at in range(start, end, BLOCK_TOKENS):
                index = at // BLOCK_TOKENS
                header = self._codec.header(layer, at, min(BLOCK_TOKENS, end - at), job.keys[index])
                job.sender.send(header, self._arena.read_block(layer, job.blocks[index]))
        except KvrelayError as error:
            job.error = error
