package server

import (
	"testing"

	"tercet.dev/tercet/server/servertest"
)

func TestBadInput(t *testing.T) {
	_, url := start(t, Options{Backend: newSingle(t)})
	servertest.BadInput(t, servertest.Target{URL: url})
}
