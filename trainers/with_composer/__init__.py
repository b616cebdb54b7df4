"""What trainers/composer_sft.py is made of. Importing Composer and StreamingDataset takes many seconds."""
