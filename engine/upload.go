package engine

// upload is a large message under way.
type upload struct {
	deadline int64
}
