//go:build unix && !linux

package disk

import "os"

// directFlags is zero where direct synchronous writes are not offered.
const directFlags = 0

// syncData makes the file durable, on Darwin through the drive's cache as well.
func syncData(f *os.File) error { return f.Sync() }

// dropCache has no portable counterpart.
func dropCache(*os.File) {}
