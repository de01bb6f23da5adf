"""Image files with more than 8 bits per channel, read and written without rounding to 8: PNG, TIFF, EXR, DICOM."""
