package auth

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// Table is the table of documents that holds the cluster's tokens, one each, by name.
const Table = "tokens"

// Backend is what following the tokens needs of a node. *raft.Node is one.
type Backend interface {
	Query(ctx context.Context, q engine.Query) (engine.Answer, error)
	StaleQuery(q engine.Query) (engine.Answer, error)
	Watch(kind raft.WatchKind, name string) (<-chan struct{}, func())
}

// documents returns a table's documents, asked for page by page.
func documents(table string, query func(engine.Query) (engine.Answer, error)) ([]engine.StoredDocument, error) {
	var all []engine.StoredDocument
	for after := ""; ; {
		answer, err := query(engine.Query{Kind: engine.QueryDocuments, Table: table, After: after, Max: 1000})
		if err != nil {
			return nil, err
		}
		all = append(all, answer.Documents...)
		if !answer.More || len(answer.Documents) == 0 {
			return all, nil
		}
		after = answer.Documents[len(answer.Documents)-1].Key
	}
}

// Stored returns the tokens of the replicated table as a query function shows them. Documents that cannot be read are
// left out, and named in the error, which comes beside the tokens.
func Stored(query func(engine.Query) (engine.Answer, error)) (tokens []Token, unreadable, err error) {
	docs, err := documents(Table, query)
	if err != nil {
		return nil, nil, err
	}
	tokens = make([]Token, 0, len(docs))
	for _, d := range docs {
		var t Token
		if e := json.Unmarshal(d.Value, &t); e != nil || t.Name != d.Key {
			unreadable = fmt.Errorf("the document of the token %q cannot be read", d.Key)
			// It counts: a token was required, and still is.
			t = Token{Name: d.Key}
		}
		tokens = append(tokens, t)
	}
	return tokens, unreadable, nil
}

// How the tokens are followed.
const (
	followRetry = 200 * time.Millisecond
	// followEvery is a safety net below the watch, which is signalled by every change.
	followEvery = 30 * time.Second
)

// Follow keeps the authenticator's stored tokens equal to the replicated table until ctx ends. The first reading is
// linearizable: a node that was away for long does not let in whom the others have turned out meanwhile.
func (a *Authenticator) Follow(ctx context.Context, b Backend, log hclog.Logger) {
	changed, cancel := b.Watch(raft.WatchDocuments, Table)
	defer cancel()
	query := func(q engine.Query) (engine.Answer, error) { return b.Query(ctx, q) }
	for first := true; ; {
		wait := followEvery
		tokens, problem, err := Stored(query)
		if err == nil {
			if e := a.SetStored(tokens); problem == nil {
				problem = e
			}
			if problem != nil {
				log.Warn("a stored token cannot be used", "error", problem)
			}
			if first {
				first, query = false, b.StaleQuery
			}
		} else {
			wait = followRetry
			if c := errs.CodeOf(err); ctx.Err() == nil && c != errs.NoLeader && c != errs.NotLeader && c != errs.Draining {
				log.Warn("the cluster's tokens cannot be read", "error", err)
			}
		}
		timer := time.NewTimer(wait)
		if first {
			// Nothing to be told of yet but the first reading.
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
			continue
		}
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}
