from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

folder = "."  # or the path of the exported folder
examples = [{"prompt": "What is a mask?", "response": "A token that hides another."}]  # yours
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def encode(example: dict[str, str]) -> dict[str, Any]:
    """Return the ids of prompt, response and EOS, and the length of the prompt."""
    messages = [{"role": "user", "content": example["prompt"]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    response = tokenizer(example["response"].strip(), add_special_tokens=False)["input_ids"]
    return {"input_ids": [*prompt, *response, tokenizer.eos_token_id], "prompt_length": len(prompt)}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows and apply the noise: each row masks its response with its own probability."""
    length = max(len(row["input_ids"]) for row in rows)
    # Pad with EOS. Padding belongs to the response, so the model learns where to end.
    clean = torch.full((len(rows), length), tokenizer.eos_token_id)
    for ids, row in zip(clean, rows, strict=True):
        ids[: len(row["input_ids"])] = torch.tensor(row["input_ids"])
    prompt_lengths = torch.tensor([[row["prompt_length"]] for row in rows])
    in_response = torch.arange(length) >= prompt_lengths
    # p_mask is uniform in (0.001, 1): its inverse, the weight in the loss, stays finite.
    p_mask = 1e-3 + (1 - 1e-3) * torch.rand(len(rows), 1)
    masked = in_response & (torch.rand(clean.shape) < p_mask)
    return {
        "input_ids": clean.masked_fill(masked, tokenizer.mask_token_id),
        "labels": clean.masked_fill(~in_response, -100),
        "p_mask": p_mask,
    }


arguments = TrainingArguments(
    "finetuned",
    remove_unused_columns=False,  # keep prompt_length for the collator
    per_device_train_batch_size=2,
    num_train_epochs=1,
    learning_rate=2.5e-5,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=[encode(example) for example in examples],
    data_collator=collate,
)
trainer.train()
trainer.save_model("finetuned")
tokenizer.save_pretrained("finetuned")
