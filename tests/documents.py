"""Code blocks of other packages' documents, run with the import line changed."""


def run(block, **names):
    """Executes a document's code block; `names` are what the document takes for granted."""
    namespace = dict(names)
    exec(compile(block, "document", "exec"), namespace)
    return namespace
