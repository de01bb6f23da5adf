"""Image files with more than 8 bits a channel, read and written without rounding to 8: PNG, TIFF, EXR, DICOM."""
