"""Hugging Face folders: export, import and verification.

Every export carries copies of configuration_llada.py, modeling_llada.py and generation_llada.py,
which import only torch and transformers.
"""
