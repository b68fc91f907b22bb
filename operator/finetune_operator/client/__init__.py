"""Python client for notebooks and pipelines: create jobs, wait for them, read their status and logs.

    from finetune_operator.client import FineTuneJobs

`AsyncFineTuneJobs` has the same methods as coroutines. Both need the extra `operator` of the package.
"""

from finetune_operator.client.asynchronous import AsyncFineTuneJobs, JobFailedError, JobNotFoundError
from finetune_operator.client.synchronous import FineTuneJobs

__all__ = ["AsyncFineTuneJobs", "FineTuneJobs", "JobFailedError", "JobNotFoundError"]
