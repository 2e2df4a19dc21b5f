"""From records to token arrays on the host, in NumPy.

| module | what is inside |
|---|---|
| `sources` | data sets of records: files, generated problems, and sources that change another source |
| `tables` | rows of data sets of the Hugging Face hub, and of files of parquet, JSON and CSV |
| `records` | the forms that a record of a file may have |
| `stream` | shuffles a source into an endless stream of records; its only state is a cursor |
| `tokenizers` | text to token ids and back: bytes, characters, SentencePiece, Hugging Face folders |
| `chat` | chat templates, and which tokens of a conversation are the assistant's |
| `stops` | texts cut at stop strings |
| `batching` | records to arrays: prompts for the sampler, supervised rows, preference pairs |

The modules are imported one by one (`from polgrad.data import sources`), because some of them load JAX.
"""

__all__ = ['batching', 'chat', 'records', 'sources', 'stops', 'stream', 'tables', 'tokenizers']
