//go:build !linux

package bench

import (
	"context"
	"errors"
)

// Volume is a file system that can be cut off from its disk; there is none on this system.
type Volume struct {
	// Dir is where it is mounted.
	Dir string
}

var errNoVolume = errors.New("losses of power can be brought about on Linux only")

// NewVolume fails.
func NewVolume(context.Context, string, int64) (*Volume, error) { return nil, errNoVolume }

// Await waits while the volume is not mounted.
func (*Volume) Await(context.Context) error { return errNoVolume }

// Close unmounts and removes it.
func (*Volume) Close() error { return errNoVolume }

func (*Volume) cut() error                    { return errNoVolume }
func (*Volume) restore(context.Context) error { return errNoVolume }
