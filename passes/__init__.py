"""The rewrites, one per file. Imported as ``onnxshrink.passes``; the registry names them by string."""

if __name__ != "onnxshrink.passes":  # the folder lies at the top level of the repository; its bare name must not import
    raise ImportError("import onnxshrink.passes, not passes")
