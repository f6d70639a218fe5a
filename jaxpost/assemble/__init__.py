"""Resolved configuration -> model, data, loss, optimiser, loop: the one place where names become functions."""

from jaxpost.assemble.answer import generate
from jaxpost.assemble.answer_file import read_prompts
from jaxpost.assemble.chat import Conversation, chat
from jaxpost.assemble.commands import convert, environment, inspect
from jaxpost.assemble.model import Pretrained, load_model
from jaxpost.assemble.served import ask_server
from jaxpost.assemble.sft import make_job
from jaxpost.assemble.train import train, writes
from jaxpost.assemble.training import Training, make_loss, make_training

__all__ = [
    "Conversation",
    "Pretrained",
    "Training",
    "ask_server",
    "chat",
    "convert",
    "environment",
    "generate",
    "inspect",
    "load_model",
    "make_job",
    "make_loss",
    "make_training",
    "read_prompts",
    "train",
    "writes",
]
