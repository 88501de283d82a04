package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"tercet.dev/tercet/internal/certs"
	"tercet.dev/tercet/server/auth"
)

// authKey is the one key of the configuration file that has a structure and no flag of its name: what it holds is too
// much for a command line, and much of it should not stand on one.
const authKey = "auth"

// authSettings is what stands there.
type authSettings struct {
	Tokens []auth.Token  `yaml:"tokens"`
	OIDC   []auth.Issuer `yaml:"oidc"`
}

// readAuth reads the part of a configuration file.
func readAuth(file string) (s authSettings, err error) {
	if file == "" {
		return s, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return s, err
	}
	defer f.Close()
	var document struct {
		Auth authSettings         `yaml:"auth"`
		Rest map[string]yaml.Node `yaml:",inline"`
	}
	dec := yaml.NewDecoder(f)
	dec.KnownFields(true)
	if err := dec.Decode(&document); err != nil && !errors.Is(err, io.EOF) {
		return s, fmt.Errorf("%s: %w", file, err)
	}
	return document.Auth, nil
}

// securityOptions are the flags that say whom a node lets in and how it is spoken to.
type securityOptions struct {
	config string // the file that auth is read from
	files  certs.Files
	from   authSettings
	alone  bool // no cluster keeps further tokens
}

func (o *securityOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.files.Cert, "tls-cert", "", "PEM `file` with the certificate of the HTTP address; read again when it changes and on SIGHUP")
	f.StringVar(&o.files.Key, "tls-key", "", "PEM `file` with the certificate's private key")
	f.StringVar(&o.files.ClientCA, "tls-client-ca", "", "PEM `file` of authorities; clients then have to present a certificate that one of them signed")
}

// check reads what the configuration file says of tokens, and checks that the flags fit together.
func (o *securityOptions) check() error {
	var problems []error
	from, err := readAuth(o.config)
	if err != nil {
		problems = append(problems, err)
	}
	o.from = from
	if (o.files.Cert == "") != (o.files.Key == "") {
		problems = append(problems, errors.New("--tls-cert and --tls-key belong together"))
	}
	if o.files.ClientCA != "" && o.files.Cert == "" {
		problems = append(problems, errors.New("--tls-client-ca needs --tls-cert and --tls-key"))
	}
	if _, err := auth.New(o.options()); err != nil {
		problems = append(problems, fmt.Errorf("%s: %w", authKey, err))
	}
	return errors.Join(problems...)
}

func (o *securityOptions) options() auth.Options {
	return auth.Options{Tokens: o.from.Tokens, Issuers: o.from.OIDC, Stored: !o.alone}
}

// authenticated reports whether requests are asked who they come from whatever the cluster's own tokens are.
func (o *securityOptions) authenticated() bool {
	return len(o.from.Tokens)+len(o.from.OIDC) > 0 || o.files.ClientCA != ""
}

// security is what a running node has of them.
type security struct {
	tokens *auth.Authenticator
	tls    *tls.Config // nil without TLS
	stop   func()
}

// open loads certificates and tokens and begins to watch for SIGHUP.
func (o *securityOptions) open(log hclog.Logger, registry prometheus.Registerer) (*security, error) {
	tokens, err := auth.New(o.options())
	if err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", authKey, err)}
	}
	s := &security{tokens: tokens}
	var reloader *certs.Reloader
	if o.files.Cert != "" {
		if reloader, err = certs.New(o.files, log.Named("tls")); err != nil {
			return nil, codedError{exitPrecondition, fmt.Errorf("--tls-cert: %w", err)}
		}
		s.tls = reloader.Config()
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "tercet_tls_certificate_expiry_timestamp_seconds",
			Help: "When the certificate of the HTTP address expires.",
		}, func() float64 { return float64(reloader.NotAfter().Unix()) }))
	}
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-hangups:
				o.reload(log, reloader, tokens)
			case <-done:
				return
			}
		}
	}()
	s.stop = func() { signal.Stop(hangups); close(done); <-ended }
	return s, nil
}

// follow keeps the tokens equal to those of the cluster until ctx ends or the returned function is called.
func (s *security) follow(ctx context.Context, node auth.Backend, log hclog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.tokens.Follow(ctx, node, log.Named("auth"))
	}()
	return func() { cancel(); <-ended }
}

// reload reads certificates and tokens again. What cannot be used changes nothing.
func (o *securityOptions) reload(log hclog.Logger, reloader *certs.Reloader, tokens *auth.Authenticator) {
	if reloader != nil {
		if err := reloader.Reload(); err != nil {
			log.Warn("SIGHUP: the certificates in use stay", "error", err)
		} else {
			log.Info("SIGHUP: certificates loaded", "expires", reloader.NotAfter().UTC())
		}
	}
	from, err := readAuth(o.config)
	if err == nil {
		err = tokens.SetConfigured(from.Tokens)
	}
	if err != nil {
		log.Warn("SIGHUP: the tokens of the configuration stay as they are", "error", err)
		return
	}
	log.Info("SIGHUP: tokens of the configuration loaded", "tokens", len(from.Tokens))
}
