//go:build !linux

package bench

import "io/fs"

// allocated is the space a file takes, as far as its length tells.
func allocated(info fs.FileInfo) int64 { return info.Size() }
