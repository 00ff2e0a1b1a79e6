"""The demo job: a small transformer trained with its sequence spread over ranks."""
