package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	"tercet.dev/tercet/cmd/tercet/internal/local"
	"tercet.dev/tercet/internal/client"
)

const (
	// vercelEvery is how often `tercet dev` looks whether the vercel.json has changed.
	vercelEvery = 500 * time.Millisecond
	// devSource marks the subscriptions that `tercet dev` made.
	devSource = "dev"
)

// checkApp checks the flags that belong to --app.
func (o *devOptions) checkApp() error {
	if o.app == "" {
		if o.deployment != "" {
			return errors.New("--deployment-id belongs to --app")
		}
		return nil
	}
	u, err := url.Parse(o.app)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("--app %q: want an http or https URL", o.app)
	}
	_, err = readVercel(o.vercelJSON, o.app, o.deployment, devSource)
	if err != nil {
		return fmt.Errorf("--vercel-json: %w", err)
	}
	return nil
}

// followVercel keeps the subscriptions what the vercel.json says, until ctx ends.
func (a *app) followVercel(ctx context.Context, cluster *local.Cluster, o devOptions) {
	var servers []string
	for _, n := range cluster.Nodes {
		servers = append(servers, n.HTTP)
	}
	cl, err := client.New(client.Options{Servers: servers, UserAgent: "tercet/" + version})
	if err != nil {
		a.note("--app: %v", err)
		return
	}
	defer cl.Close()
	var applied, failed string
	for {
		// The whole content is compared: editors replace files, and times are coarse.
		if data, err := os.ReadFile(o.vercelJSON); err == nil && string(data) != applied && string(data) != failed {
			if err := a.applyVercel(ctx, cl, o); err == nil {
				applied, failed = string(data), ""
			} else if ctx.Err() == nil {
				failed = string(data)
				a.note("%v; the subscriptions stay as they are until the file changes", err)
			}
		}
		if !pause(ctx, vercelEvery) {
			return
		}
	}
}

// applyVercel makes the subscriptions what the vercel.json says now.
func (a *app) applyVercel(ctx context.Context, cl *client.Client, o devOptions) error {
	subs, err := readVercel(o.vercelJSON, o.app, o.deployment, devSource)
	if err != nil {
		return err
	}
	if len(subs) == 0 {
		a.note("%s has no queue triggers", o.vercelJSON)
	}
	return applySubscriptions(ctx, cl, devSource, subs, true, false, func(s applied) error {
		switch s.Change {
		case "created", "changed":
			a.note("pushing %s to %s, as group %s", s.Topic, s.URL, s.ConsumerGroup)
		case "deleted":
			a.note("no longer pushing %s to %s", s.Topic, s.URL)
		case "unchanged":
			if ctx.Err() == nil {
				a.note("pushing %s to %s, as group %s, as before", s.Topic, s.URL, s.ConsumerGroup)
			}
		}
		return nil
	})
}
