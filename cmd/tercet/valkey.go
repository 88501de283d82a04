package main

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"

	"tercet.dev/tercet/compat"
	"tercet.dev/tercet/raft"
)

// valkeyOptions are the flags of the Valkey port.
type valkeyOptions struct {
	addr, announce string
	mode           string
	acl            string
	certUsers      bool
	flushAllowed   bool
	// upstream is a real server beside the log, keep the patterns of the keys that are the log's.
	upstream string
	keep     []string
	login    upstreamOptions
}

func (o *valkeyOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.addr, "valkey", "", "`address` for Valkey and Redis clients; without a host 127.0.0.1 and ::1; without this flag there is none")
	f.StringVar(&o.announce, "valkey-announce", "", "`address` that cluster clients and the other nodes are told instead of --valkey")
	f.StringVar(&o.mode, "valkey-mode", "standalone", "what Valkey clients see: standalone (every node takes everything) or cluster (one shard, clients are sent to the leader)")
	f.StringVar(&o.acl, "valkey-acl", "", "`file` of users in Valkey's form; without it users are the cluster's own (ACL SETUSER)")
	f.BoolVar(&o.certUsers, "valkey-cert-users", false, "let Valkey clients in as the user that the common name of their certificate says; needs --tls-client-ca")
	f.StringVar(&o.upstream, "upstream", "", "`address` of a real server, rediss://user:password@host:port: commands on keys that match no --upstream-except, and commands that Tercet does not know, are passed to it")
	f.StringSliceVar(&o.keep, "upstream-except", nil, "`patterns` of the keys whose streams Tercet keeps in spite of --upstream: 'orders*,contact-*'")
	o.login.register(f)
	f.BoolVar(&o.flushAllowed, "flush-allowed", false, "offer FLUSHALL and FLUSHDB to Valkey clients")
}

// check checks the flags; authenticated says that connections have to present a certificate.
func (o *valkeyOptions) check(authenticated, insecure bool) error {
	var problems []error
	if o.addr != "" {
		if err := checkAddress(o.addr, authenticated || o.acl != "", insecure); err != nil {
			problems = append(problems, fmt.Errorf("--valkey: %w", err))
		}
	}
	if o.mode != "standalone" && o.mode != "cluster" {
		problems = append(problems, fmt.Errorf("--valkey-mode %q: want standalone or cluster", o.mode))
	}
	if o.announce != "" {
		if _, _, err := net.SplitHostPort(o.announce); err != nil {
			problems = append(problems, fmt.Errorf("--valkey-announce %q: want HOST:PORT", o.announce))
		}
	}
	if o.certUsers && !authenticated {
		problems = append(problems, errors.New("--valkey-cert-users needs --tls-client-ca: nobody else says whom a certificate is to be believed from"))
	}
	switch {
	case o.upstream != "" && len(o.keep) == 0:
		problems = append(problems, errors.New("--upstream needs --upstream-except: without it nothing would be Tercet's"))
	case o.upstream != "" && o.addr == "":
		problems = append(problems, errors.New("--upstream needs --valkey: commands are passed on from there"))
	case o.upstream != "" && o.mode == "cluster":
		problems = append(problems, errors.New("--upstream and --valkey-mode cluster exclude each other: the slots could be on one side only"))
	case o.upstream == "" && len(o.keep) > 0:
		problems = append(problems, errors.New("--upstream-except needs --upstream"))
	}
	return errors.Join(problems...)
}

// advertised is what others are told about where this node's Valkey port is.
func (o *valkeyOptions) advertised() string {
	switch {
	case o.announce != "":
		return o.announce
	case o.addr == "":
		return ""
	}
	return advertised(o.addr)
}

// valkeyPort is the running front end; nil when there is none.
type valkeyPort struct {
	srv       *compat.Server
	listeners []net.Listener
	failed    chan error
}

// open makes the front end. The listeners are those of listen.
func (o *valkeyOptions) open(node *raft.Node, listeners []net.Listener, secured *security, clientCerts, insecure bool, log hclog.Logger, registry prometheus.Registerer) (*valkeyPort, error) {
	if o.addr == "" {
		return nil, nil
	}
	options := compat.Options{
		Backend: node, Version: version, Logger: log.Named("valkey"), Registerer: registry, Cluster: o.mode == "cluster",
		FlushAllowed: o.flushAllowed, Insecure: insecure, TLS: secured.tls, ClientCertificates: clientCerts, CertificateUsers: o.certUsers,
	}
	if o.upstream != "" {
		target, err := o.login.target(context.Background(), "--upstream", o.upstream)
		if err != nil {
			return nil, err
		}
		options.Upstream, options.UpstreamKeep = target, o.keep
	}
	if o.acl != "" {
		users, err := compat.LoadUsersFile(o.acl)
		if err != nil {
			return nil, codedError{exitPrecondition, fmt.Errorf("--valkey-acl: %w", err)}
		}
		options.Users, options.UsersFrom = users, o.acl
	}
	srv, err := compat.New(options)
	if err != nil {
		return nil, err
	}
	p := &valkeyPort{srv: srv, listeners: listeners, failed: make(chan error, len(listeners))}
	for _, l := range listeners {
		go func() { p.failed <- srv.Serve(l) }()
	}
	return p, nil
}

// listen opens the port before the node starts, so that a taken one is found at once.
func (o *valkeyOptions) listen(ctx context.Context) ([]net.Listener, error) {
	if o.addr == "" {
		return nil, nil
	}
	return listenAs(ctx, "--valkey", o.addr)
}

func (p *valkeyPort) drain() {
	if p != nil {
		p.srv.Drain()
	}
}

func (p *valkeyPort) shutdown(ctx context.Context) error {
	if p == nil {
		return nil
	}
	return p.srv.Shutdown(ctx)
}

func (p *valkeyPort) close() {
	if p != nil {
		_ = p.srv.Close()
	}
}

// failures delivers what ends the port; it never does without one.
func (p *valkeyPort) failures() <-chan error {
	if p == nil {
		return nil
	}
	return p.failed
}
