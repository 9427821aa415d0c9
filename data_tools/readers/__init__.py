"""Read documents from files and datasets.

From the inside out: `options`, `report` and `records` hold the types that all readers share,
`input_file` says what is read and how it can be cut. Each format has a file: `text_files`,
`json_lines`, `json_arrays`, `tables`, `hf_datasets`. `sources` resolves `--input`, and `reading`
is what the rest of the package calls: it picks the format and yields documents.
"""
