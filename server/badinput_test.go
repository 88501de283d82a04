package server

import (
	"testing"

	"tercet.dev/tercet/server/servertest"
)

func TestBadInput(t *testing.T) {
	_, url := start(t, Options{Backend: &fakeBackend{}})
	servertest.BadInput(t, servertest.Target{URL: url})
}
