"""Loader workers of streamed datasets, which read whole shards."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import DataError
from .runtime import option_errors

__all__ = ['check_batches', 'shard_workers']

_logger = logging.getLogger(__name__)


def shard_workers(dataset: Any, name: str, split: str, workers: int, processes: int) -> int:
    """Returns the number of loader workers of each process that get a shard, at most ``workers``.

    timm's readers give each worker its own shards. One without a shard would read nothing, so that an epoch would end
    early, and a process without images would make the others wait.

    Args:
        dataset: The dataset. One that is not streamed, or whose shards are made for the workers, has no limit.
        name: Name of the dataset, for messages.
        split: Name of the split, for messages.
        workers: Workers per process; 0 if the process itself reads.
        processes: Number of processes.

    Raises:
        DataError: A process would get no shard.
    """
    reader = getattr(dataset, 'reader', None)
    if hasattr(reader, 'split_info'):  # ReaderWds
        shards = len(reader.split_info.filenames)
        most = shards // processes
    elif hasattr(reader, 'builder') and hasattr(reader, 'download') and not reader.download:  # ReaderHfids
        with option_errors(f'{name}, {split} split'):
            shards = reader.builder.as_streaming_dataset(split=reader.split).num_shards
        # If the shards cannot be divided, every process reads all of them and takes its share of the images
        most = shards // processes if shards % processes == 0 else shards
    else:
        return workers
    count = f'the {split} split has {shards} shard{"s" * (shards != 1)} for {processes} process{"es" * (processes > 1)}'
    if most == 0:
        raise DataError(
            f'{name}: {count}: write it as at least {processes} shards, better several for each process, or start '
            'fewer processes'
        )
    if workers > most:
        _logger.info(f'{name}: {count}, so a process has {most} of {workers} loader workers (--workers).')
    return min(workers, most)


def check_batches(batches: int, expected: int, name: str, split: str) -> None:
    """Raises `DataError` if an epoch ended early, as that of a streamed dataset without readable images does."""
    if batches < expected:
        raise DataError(
            f'{name or "the data"}: the {split} split ended after {batches} of {expected} batches: check that its '
            'shards exist and that their images can be read'
        )
