"""Read documents from files and datasets.

From the inside out: `options`, `report` and `records` hold the types that all readers share, and
`input_file` describes one file and how it can be cut. Each kind of format has a module:
`text_files`, `json_lines`, `json_arrays`, `tables`, `hf_datasets`; `formats` registers them.
`sources` resolves `--input`, and `reading` is what the rest of the package calls: it yields the
documents of a source of any format.
"""
