package server

import (
	"bytes"
	_ "embed"
	"html/template"
	"net/http"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

//go:embed status.html
var statusHTML string

var statusTemplate = template.Must(template.New("status").Parse(statusHTML))

// statusPolicy lets the page load nothing: it is one document with its style inside and no script.
const statusPolicy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// statusTopicsMax bounds the topics shown.
const statusTopicsMax = 50

// statusData is what the page shows.
type statusData struct {
	Status   raft.Status
	Version  string
	Ready    string // why not, empty when ready
	InSync   int
	Voters   int
	Topics   []engine.TopicInfo
	More     bool
	TopicErr string
	Now      string
}

// statusPage answers GET /: the cluster and its topics at a glance.
func (x *exchange) statusPage() {
	st := x.s.backend.Status()
	data := statusData{Status: st, Version: x.version(&st), InSync: len(st.InSync), Now: time.Now().UTC().Format("2006-01-02 15:04:05 UTC")}
	for _, c := range x.s.checks() {
		if c.err != nil {
			data.Ready = c.err.Error()
			break
		}
	}
	for _, n := range st.Nodes {
		if n.Role != raft.NonVoter {
			data.Voters++
		}
	}
	answer, e := x.ask(engine.Query{Kind: engine.QueryTopics, Max: statusTopicsMax})
	if e != nil {
		data.TopicErr = e.Text()
	}
	data.Topics, data.More = answer.Topics, answer.More
	var page bytes.Buffer
	if err := statusTemplate.Execute(&page, data); err != nil {
		x.s.log.Error("the status page could not be rendered", "error", err)
	}
	h := x.w.Header()
	h["Content-Type"] = []string{"text/html; charset=utf-8"}
	h["Content-Security-Policy"] = []string{statusPolicy}
	h["X-Content-Type-Options"] = noSniff
	h["X-Frame-Options"] = []string{"DENY"}
	h["Referrer-Policy"] = []string{"no-referrer"}
	h["Cache-Control"] = noStore
	h[wire.HeaderRequestID] = []string{x.requestID()}
	x.w.WriteHeader(http.StatusOK)
	if x.r.Method != http.MethodHead {
		x.w.Write(page.Bytes())
	}
}
