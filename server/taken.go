package server

import (
	"errors"
	"syscall"
)

// addressTaken reports whether another socket has the address.
func addressTaken(err error) bool { return errors.Is(err, syscall.EADDRINUSE) }
