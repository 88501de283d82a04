//go:build !invariants

package engine

// invariants turns on the checks of DESIGN.md's numbered invariants after every entry.
const invariants = false

func (e *Engine) checkInvariants() {}
