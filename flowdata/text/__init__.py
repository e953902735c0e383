"""Text files and chats as token samples, and the models that read them."""
