// Package server is Tercet's HTTP surface: the queue protocol under /api/v3, administration under /v1, health,
// metrics, and a status page.
//
// The package turns requests into engine commands for a [Backend] and results into answers. It holds no queue
// state. What it owns is the edge: every bound on what a client may send is checked here, before memory is
// spent on it, and every answer says whether the request happened, did not happen, or may have (see [Server]
// and DESIGN.md beside this file).
//
//   - wire: header names, media types, documents and framing that clients share;
//   - servertest: the table of bad input that runs against any base URL.
package server
