"""What models share: loading pipelines, LoRA files, embeddings of prompts, networks on points."""
