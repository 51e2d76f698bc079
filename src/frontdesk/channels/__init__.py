"""How notifications leave the house: their texts, and a module a channel. Imported only where one is configured."""
