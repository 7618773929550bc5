"""A decomposed model behind HTTP: one front that speaks OpenAI's protocol, and the engines that compute for it."""
