"""The text around an instruction, the same when a model is fine-tuned and when it is asked."""


def alpaca_prompt(instruction, input=""):
    """Stanford Alpaca's prompt for an instruction and, where there is one, its input; the answer follows it.

    The words are those of github.com/tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT); a line end follows the last
    heading, so that the answer begins with a token of its own.
    """
    if input:
        return ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
    return ("Below is an instruction that describes a task. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{instruction}\n\n### Response:\n")
